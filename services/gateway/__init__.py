"""The gRPC surface: the ingress deployment of the application, on CPUs."""
