"""What a request is and what it brings, in the server's own words: no torch, no grpc."""
