"""Round loop: exchanges, their log, asynchronous rounds, and client states."""
