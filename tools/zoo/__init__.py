"""`fastlora zoo`: a tiny model of every architecture that the installed transformers knows, eager and compiled."""
