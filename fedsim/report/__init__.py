"""Tables, figures, a page and the time to accuracy on a network, made from records alone."""
