"""Tables, figures, the HTML and Markdown report, and the time to accuracy on a network, from the records of runs."""
