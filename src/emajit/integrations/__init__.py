"""Callbacks for other libraries' training loops; each is imported by its own name."""
