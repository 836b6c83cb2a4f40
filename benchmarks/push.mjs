// Receives broadcasts with the unmodified supabase-js and prints when each callback ran, in nanoseconds of the monotonic
// clock that Python's time.monotonic_ns reads. Environment: SUPABASE_URL, SUPABASE_ANON_KEY, TOPIC.
import { createClient } from '@supabase/supabase-js'
import WebSocket from 'ws'

const { SUPABASE_URL, SUPABASE_ANON_KEY, TOPIC } = process.env
const print = (line) => console.log(JSON.stringify(line))
const supabase = createClient(SUPABASE_URL, SUPABASE_ANON_KEY, { realtime: { transport: WebSocket } })

supabase
  .channel(TOPIC)
  .on('broadcast', { event: 'ping' }, (message) =>
    print({ n: message.payload.n, at: process.hrtime.bigint().toString() }))
  .subscribe((status) => print({ status }))
