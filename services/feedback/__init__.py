"""The feedback service: a page for people and gRPC for programs, over `accord.feedback`, without Ray."""
