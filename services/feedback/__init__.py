"""The feedback service: a rating page for people and gRPC for programs, over `accord.feedback`, without Ray."""
