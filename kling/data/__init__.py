"""Frames and pictures, data sets of real videos, and the small world."""
