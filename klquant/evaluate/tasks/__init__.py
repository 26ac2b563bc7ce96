"""Tasks with right and wrong answers, on the models of an evaluation: lm-eval's, and needles in filler text."""
