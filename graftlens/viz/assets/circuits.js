// `circuits(place, component, props)` shows a CircuitsVis component in an element with an id, or
// gives new props to the one that is there.
//
// `CircuitsVis.render` makes a React root at each call and never lets go of its charts. So one root
// stays in each place, with a component that React can be told to draw again. React itself is not
// exported; `Hello`, which is only an element, gives the form of an element.
class Shown {
  constructor(props) { this.props = props; props.place.shown = this; }
  render() {
    const {component, props} = this.props.place.asked;
    return {...CircuitsVis.Hello({name: ""}), type: component, props};
  }
}
Shown.prototype.isReactComponent = {};
Shown.prototype.componentDidMount = function () {
  this.props.place.removeAttribute("aria-busy");
};
function circuits(place, component, props) {
  const first = !place.asked;
  place.asked = {component, props};
  if (first) CircuitsVis.render(place.id, Shown, {place});
  // One that is not there yet will be made of what is asked last.
  else if (place.shown) place.shown.updater.enqueueForceUpdate(place.shown);
}
