"""How the report calls things, in the order in which it shows them."""

SPLITS = {
    "seen": "Seen prompts",
    "unseen_combination": "Unseen combinations",
    "unseen_object": "Unseen objects",
}
CATEGORIES = {
    "overall": "All",
    "count": "Count",
    "colour": "Colour",
    "background": "Background",
    "combination": "Combination",
}
QUESTIONS = {"alignment": "Which fits the prompt better?", "fidelity": "Which looks better?"}
