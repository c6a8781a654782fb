"""The whole path on a laptop: stages in order, their figures and the report."""
