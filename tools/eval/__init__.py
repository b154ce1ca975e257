"""`v4 eval needle | perplexity | tools`: what a trained model can do, on any backend and in any precision mode."""
