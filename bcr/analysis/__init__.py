"""What the results say: measures (pure functions), plots, reports."""
