"""Workers that run workloads, one for each engine, each in an environment of its own."""
