"""What is asked and how an answer is judged: problems, bundles, dialects, the grader. No torch, no model."""
