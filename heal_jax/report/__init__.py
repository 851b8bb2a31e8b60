"""What a person reads of a run: report.html (page) and single rollouts in the terminal (show)."""
