// Every page loads this one. What a page can do is marked on its elements; nothing here knows which page it is on.

import { localTimes } from "./times.js";
import { live } from "./live.js";
import { enhance } from "./actions.js";

localTimes();
enhance();
live();
