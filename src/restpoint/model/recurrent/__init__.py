"""Language models that iterate one block: recurrent depth, and deep equilibrium; importing a model registers it."""
