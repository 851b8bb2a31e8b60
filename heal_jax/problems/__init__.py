"""Problems, the answers found in rollouts, and their grades."""
