"""What a trained run is for: its parameters, predictions and exports."""
