"""How much each unit and each layer matters."""
