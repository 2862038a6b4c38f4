"""Measurements of this project, and the tables made from what they recorded."""
