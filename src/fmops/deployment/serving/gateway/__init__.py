"""The one door to the engines: who may ask, how much, who answers, and what is remembered."""
