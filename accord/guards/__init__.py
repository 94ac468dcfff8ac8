"""What watches a fine-tuning for reward hacking: measures of a snapshot of the model, and a rule that reads
them."""
