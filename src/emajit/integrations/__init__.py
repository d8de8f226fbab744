"""Callbacks for other libraries' training loops; import each module by its own name."""
