import type { RealtimeChannel } from '@supabase/supabase-js'
import { AutotagError } from './errors.js'
import { within } from './limit.js'
import type { AnyClient, BatchComplete, JobComplete, JobProgress, Listener, LiveStatus } from './types.js'

const LINGER = 1_000 // ms from the end of the last listener to the end of the channel, because StrictMode and routes come back
const FIRST_DELAY = 1_000 // ms before the channel is joined again; doubled with each failure
const LONGEST_DELAY = 30_000
const STEADY = 10_000 // ms after which a subscription counts as a success
const TOKEN_LIMIT = 10_000 // ms for a token; after that, it is requested again
const PROVIDER = 'The provider of the access token'
const MAX_JOBS = 1_000 // uploads whose count is remembered
const LONG_HIDDEN = 30_000 // ms in the background after which messages may have been missed

/** The channels of this package. All other channels on the same topics belong to other parts of the page. */
const own = new WeakSet<RealtimeChannel>()

type AccessToken = () => Promise<string | null>
type Message = { event: string, payload: unknown }

/** The user of a token; null: nobody. A server key has no user, so it counts as its own. */
export function userOf(token: string | null | undefined): string | null {
  if (!token || token.startsWith('sb_publishable_')) return null
  try {
    const part = token.split('.')[1]!.replace(/-/g, '+').replace(/_/g, '/')
    const claims = JSON.parse(atob(part)) as { sub?: string, role?: string }
    return claims.sub ?? (claims.role === 'anon' ? null : claims.role ?? null)
  } catch {
    return token
  }
}

/** Whether it can be the key of a row. A number that JSON has rounded may be the key of another row. */
const isId = (id: unknown): boolean => typeof id === 'string' || Number.isSafeInteger(id)

/**
 * The one private channel of a workspace, shared by all parts of a page. It joins with the newest token, joins again when the
 * channel ends, and leaves when nobody listens or another user has signed in.
 */
export class Live<Id = string | number> {
  status: LiveStatus = 'connecting'
  error: AutotagError | null = null
  /** When the last subscription was complete. Rows that were fetched later have missed no change. */
  liveSince = Infinity
  readonly #listeners = new Set<Listener<Id>>()
  readonly #supabase: AnyClient
  readonly #topic: string
  /** The newest function that was given: one from an earlier render knows only an old token. */
  accessToken: AccessToken | undefined
  /** Forgets what caches keep without showing it, when its user signs out. */
  readonly kept = new Map<object, () => void>()
  #channel: RealtimeChannel | null = null
  #left: Promise<unknown> = Promise.resolve()
  #turn = 0 // number of the current join; reports of earlier ones are ignored
  #failures = 0
  #user: string | null | undefined // undefined: unknown yet
  #refused: string | null = null // the user whose refusal has been reported
  #timer: ReturnType<typeof setTimeout> | undefined
  #lastListener: ReturnType<typeof setTimeout> | undefined
  #stopWatching: (() => void) | null = null
  #hasAuth = false
  #hiddenAt = 0
  #listsIds = false // the server lists the ids of changed rows
  readonly #counted = new Map<string, number>() // ended images of each upload, from its last message
  #checked: Promise<unknown> = Promise.resolve()

  constructor(supabase: AnyClient, workspaceId: string | number, accessToken?: AccessToken) {
    this.#supabase = supabase
    this.#topic = `tagging:${workspaceId}`
    this.accessToken = accessToken
  }

  /** Adds a listener, and returns the function that removes it. */
  listen(listener: Listener<Id>): () => void {
    const added = { ...listener } // the same object twice is two listeners
    this.#listeners.add(added)
    clearTimeout(this.#lastListener)
    if (!this.#stopWatching) {
      this.#stopWatching = this.#watch()
      this.#watchAuth()
      void this.connect()
    }
    added.onStatus?.(this.status, this.error)
    if (this.status === 'live') added.onSync?.() // its rows may be older than its subscription
    return () => {
      if (!this.#listeners.delete(added) || this.#listeners.size) return
      clearTimeout(this.#lastListener)
      this.#lastListener = setTimeout(() => this.#stop(), LINGER)
    }
  }

  /** Joins again with the newest token. */
  async connect(): Promise<void> {
    this.#leave()
    if (!this.#listeners.size) return
    const turn = this.#turn
    if (this.status !== 'refused' && this.status !== 'signed-out') this.#say('connecting')
    await this.#left
    if (turn !== this.#turn) return
    let user: string | null
    try {
      user = userOf(await this.#authorize())
    } catch (error) {
      if (turn === this.#turn) this.#failWith(error)
      return
    }
    if (turn !== this.#turn) return
    this.#meet(user)
    if (user === null) {
      this.#say('signed-out')
      // supabase.auth reports a sign-in with an event; a token provider may just not have loaded yet
      this.#again(this.#hasAuth ? LONGEST_DELAY : this.#delay())
      return
    }
    if (this.status === 'signed-out') this.#say('connecting')
    const others = this.#supabase.getChannels().filter((channel) => !own.has(channel))
    const channel = this.#supabase.channel(this.#topic, { config: { private: true } })
    if (others.includes(channel) || channel.state !== 'closed') { // the channel would be shared, and one part would end it for both
      this.#fail(`Another part of this page uses the topic ${this.#topic}.`, 'topic_in_use', 'Let it use subscribe() of supabase-autotag, too.')
      return
    }
    own.add(channel)
    this.#channel = channel
    channel
      .on('broadcast', { event: '*' }, (message) => { if (turn === this.#turn) this.#receive(message as unknown as Message) })
      .subscribe((status, error) => {
        if (turn !== this.#turn) return
        if (status === 'SUBSCRIBED') {
          this.#refused = null
          this.liveSince = Date.now()
          this.#say('live')
          this.sync()
        } else if (status === 'CHANNEL_ERROR' && /^"?Unauthorized\b/.test(error?.message ?? '')) {
          this.#refuse(user, error!.message)
        } else {
          this.#fail(error?.message ?? status)
        }
      })
  }

  sync(): void { this.#tell((listener) => listener.onSync?.()) }

  enqueued(assetIds: readonly Id[], since: number): void { this.#tell((listener) => listener.onEnqueued?.(assetIds, since)) }

  changed(assetIds: Id[] | null, jobId: string | null): void { this.#tell((listener) => listener.onChange?.(assetIds, jobId)) }

  // -- messages

  #receive(message: Message): void {
    if (this.#hasAuth) return this.#deliver(message)
    // A token provider sends no event when its user changes, so ask it before each message.
    const turn = this.#turn
    this.#checked = this.#checked.then(() => this.#token()).then((token) => {
      if (turn !== this.#turn) return
      if (userOf(token) === this.#user) this.#deliver(message)
      else void this.connect()
    }).catch((error: unknown) => { if (turn === this.#turn) this.#failWith(error) })
  }

  #deliver({ event, payload }: Message): void {
    if (!payload || typeof payload !== 'object') return
    let message = payload as JobProgress<Id> & BatchComplete
    const ids: unknown = message.asset_ids
    this.#listsIds ||= ids !== undefined
    if (ids != null && !(Array.isArray(ids) && ids.every(isId))) message = { ...message, asset_ids: null, many: true }
    const counts = event.startsWith('job-') && typeof message.job_id === 'string' && this.#isNewest(event, message)
    this.#tell((listener) => {
      if (event === 'job-progress' && counts) listener.onProgress?.(message)
      else if (event === 'job-complete' && counts) listener.onJobComplete?.(message as JobComplete<Id>)
      else if (event === 'batch-complete') listener.onBatchComplete?.(message)
    })
    // If the server lists ids, the messages of the batch's job name its rows.
    if (message.asset_ids === undefined && this.#listsIds && event === 'batch-complete') return
    if (message.asset_ids?.length !== 0) this.changed(message.asset_ids ?? null, message.job_id ?? null)
  }

  /** Whether a message is newer than all earlier ones of its upload, because messages may arrive out of order. The end is the newest. */
  #isNewest(event: string, { job_id, completed, failed }: JobProgress<Id>): boolean {
    const count = event === 'job-complete' ? Infinity : completed + failed
    if (count < this.#counted.get(job_id)!) return false
    this.#counted.set(job_id, count)
    if (this.#counted.size > MAX_JOBS) this.#counted.delete(this.#counted.keys().next().value!)
    return true
  }

  #tell(say: (listener: Listener<Id>) => void): void {
    for (const listener of [...this.#listeners]) {
      try {
        say(listener)
      } catch (error) { // an error in one part of the page must not stop the others
        setTimeout(() => { throw error })
      }
    }
  }

  #say(status: LiveStatus, error: AutotagError | null = null): void {
    if (status === this.status && error?.message === this.error?.message) return
    this.status = status
    this.error = error
    this.#tell((listener) => listener.onStatus?.(status, error))
  }

  // -- joining and leaving

  /** The newest token, without telling the socket. */
  async #token(): Promise<string | null> {
    const realtime = this.#supabase.realtime
    return await within(TOKEN_LIMIT, PROVIDER, async () =>
      this.accessToken ? await this.accessToken() : await realtime.accessToken?.() ?? realtime.accessTokenValue)
  }

  /** Gives the socket the newest token before it joins: without one, the first join of a page is refused. */
  async #authorize(): Promise<string | null> {
    const realtime = this.#supabase.realtime
    const { accessToken } = this
    return await within(TOKEN_LIMIT, PROVIDER, async (signal) => {
      if (!accessToken) {
        await realtime.setAuth()
        return realtime.accessTokenValue
      }
      const token = await accessToken()
      if (token && !signal.aborted) await realtime.setAuth(token)
      return token
    })
  }

  /** Notes who is signed in. */
  #meet(user: string | null): void {
    const former = this.#user
    this.#user = user
    if (former === undefined || former === user) return
    this.#refused = null
    this.#failures = 0
    this.#tell((listener) => listener.onUserChange?.())
    for (const forget of this.kept.values()) forget()
  }

  #leave(): void {
    this.#turn++
    clearTimeout(this.#timer)
    this.#timer = undefined
    this.liveSince = Infinity
    const channel = this.#channel
    this.#channel = null
    this.#checked = Promise.resolve() // a token provider that never answers must not block later channels
    // supabase-js would return a channel that is still closing for the same topic.
    if (channel) this.#left = Promise.resolve(this.#supabase.removeChannel(channel)).catch(() => undefined)
  }

  #fail(message: string, code = 'channel', hint = ''): void {
    if (Date.now() - this.liveSince > STEADY) this.#failures = 0
    this.#leave()
    if (this.#offline()) this.#say('offline')
    else this.#say('connecting', new AutotagError(code, message, hint))
    this.#again(this.#delay())
  }

  #failWith(error: unknown): void {
    if (error instanceof AutotagError) this.#fail(error.message, error.code, error.hint)
    else this.#fail(String(error))
  }

  /** ms until the next try. */
  #delay(): number { return Math.min(FIRST_DELAY * 2 ** this.#failures++, LONGEST_DELAY) * (0.75 + Math.random() / 2) }

  #refuse(user: string, message: string): void {
    this.#leave()
    const known = this.#refused === user
    this.#refused = user
    if (known && this.status === 'refused') return
    this.#say('refused', new AutotagError('refused', message, 'Only members of the workspace receive its messages.'))
  }

  #again(delay: number): void {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => { void this.connect() }, delay)
  }

  #stop(): void {
    this.#leave()
    this.#stopWatching?.()
    this.#stopWatching = null
    if (!this.#hasAuth) { // from now on, a change of user would go unnoticed
      this.#user = undefined
      for (const forget of this.kept.values()) forget()
    }
    this.#refused = null
    this.#failures = 0
    this.status = 'connecting'
    this.error = null
  }

  // -- events of the page

  #offline(): boolean { return globalThis.navigator?.onLine === false }

  #watch(): () => void {
    const now = (): void => { this.#failures = 0; if (this.status !== 'refused') void this.connect() }
    const seen = (): void => {
      if (document.visibilityState === 'hidden') { this.#hiddenAt = Date.now(); return }
      const long = this.#hiddenAt && Date.now() - this.#hiddenAt > LONG_HIDDEN
      this.#hiddenAt = 0
      if (this.status !== 'live') now()
      else if (long) this.sync()
    }
    const lost = (): void => { this.#leave(); this.#say('offline') }
    const page = typeof document === 'undefined' ? null : document
    const view = typeof window === 'undefined' || !window.addEventListener ? null : window
    page?.addEventListener?.('visibilitychange', seen)
    view?.addEventListener('online', now)
    view?.addEventListener('offline', lost)
    return () => {
      page?.removeEventListener?.('visibilitychange', seen)
      view?.removeEventListener('online', now)
      view?.removeEventListener('offline', lost)
    }
  }

  /** Follows changes of the user, even without listeners, because caches keep rows. */
  #watchAuth(): void {
    if (this.#hasAuth || this.accessToken) return
    try {
      this.#supabase.auth.onAuthStateChange((event, session) => {
        if (event === 'INITIAL_SESSION') return // joining reads it
        const user = session?.user.id ?? null
        const changed = user !== this.#user // also while the first join reads the token, because its user is still unknown
        if (changed) { // at once, so that nothing is delivered to the former user
          this.#leave()
          this.#meet(user)
          this.#say(user ? 'connecting' : 'signed-out')
        }
        // supabase-js gives a new token to channels that have joined. It must not be called from within this callback.
        const renewed = event === 'TOKEN_REFRESHED' || event === 'MFA_CHALLENGE_VERIFIED'
        const waits = this.#timer !== undefined || (this.status === 'refused' && renewed)
        if (user && (changed || waits)) this.#again(0)
      })
      this.#hasAuth = true
    } catch { /* the option `accessToken` of supabase-js: there is no `auth` */ }
  }
}
