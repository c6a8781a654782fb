"""Sources -> token stores -> documents -> packed rows -> batches."""
