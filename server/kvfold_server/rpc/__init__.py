"""The gRPC front end: services, conversion, errors, the server. Imports no torch."""
