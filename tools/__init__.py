"""The command line, benchmarks and the zoo, on top of fastlora's public API."""
