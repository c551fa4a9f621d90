"""How much of the exact posterior a trained adapter reaches, where it is known in closed form."""
