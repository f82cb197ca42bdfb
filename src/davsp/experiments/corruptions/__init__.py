"""What is left of a border's effect when the canvas is changed on its way to the model."""
