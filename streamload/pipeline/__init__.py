"""How do bytes flow, bounded and cancellable?"""
