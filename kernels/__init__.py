"""Operations under the model and the adapters: their definitions, and their fast forms."""
