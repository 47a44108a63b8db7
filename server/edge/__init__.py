"""Everything around the endpoints: the app, keys, limits, errors, logs, metrics, the process."""
