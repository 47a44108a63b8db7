"""The HTTP edge: routes, schemas, errors, metrics and the command line."""
