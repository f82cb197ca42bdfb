"""The web demo: a picture and a question, answered with and without a defense, side by side."""
