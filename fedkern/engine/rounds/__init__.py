"""The round loop: exchanges, their log, asynchronous rounds, and what a round leaves."""
