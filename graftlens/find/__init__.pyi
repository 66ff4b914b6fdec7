from .attribution import attribute as attribute
from .exact import exact_effects as exact_effects
from .interactions import interactions as interactions
from .places import Place as Place
from .places import places_of as places_of
from .places import ranking as ranking
from .players import players_of as players_of
