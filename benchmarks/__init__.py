"""Speed against named alternatives.

This is a package of its own because opacus installs another one of this name.
"""
