from .interactions import interactions as interactions
from .players import players_of as players_of
