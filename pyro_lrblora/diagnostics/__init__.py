"""Should this posterior be believed, and where is the uncertainty: one file per question."""
