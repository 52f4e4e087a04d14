"""What prepares a run: its objects, the user's parts, and whether data, network and method fit."""
