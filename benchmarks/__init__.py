"""Speed against named alternatives. A package of its own: opacus installs another one of this name."""
