"""The exact library: what a denoiser is made of, what it costs, how it runs under gates, and how it is cut."""
