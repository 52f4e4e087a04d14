"""Preparation of a run: its objects, the user's parts, and checks that data, network and method fit."""
