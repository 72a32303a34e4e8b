"""Published weights: which there are, how their files are named, and the way in and out."""
