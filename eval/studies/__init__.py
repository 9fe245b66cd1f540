"""Studies that need nothing from elsewhere: a teacher and its students on digits or emoji, models of points."""
