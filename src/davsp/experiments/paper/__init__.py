"""Every table of the paper, one command each."""
