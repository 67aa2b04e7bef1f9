"""Two-way maps between tensor names: rules as data, and the steps that move numbers."""
