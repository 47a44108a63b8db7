"""The HTTP server: routes, schemas, errors, metrics and the command line."""
