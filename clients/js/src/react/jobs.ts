import type { QueryClient, QueryKey } from '@tanstack/react-query'
import { AutotagError } from '../errors.js'
import type { Autotag } from '../index.js'
import type { Job, JobComplete, JobProgress } from '../types.js'
import { fetchingAnew } from './shared.js'

const MOST = 100 // uploads of a list; the server lists as many at once
const RECENT = 20 // of the newest ones that a load asks for, to find those that it has missed
const LANES = 4 // requests at once

/** An upload as messages tell it; the other fields are there once it was fetched. */
export type LiveJob = Pick<Job, 'job_id' | 'image_count' | 'completed' | 'failed' | 'progress' | 'eta'> & Partial<Job>
type Change = Partial<LiveJob>

/** What a message says of an upload. */
function told(message: JobProgress | JobComplete): Change & { job_id: string } {
  const { job_id, completed, failed, image_count, status } = message
  const rest = 'progress' in message ? { progress: message.progress, eta: message.eta } : { progress: 100, eta: null }
  return { job_id, completed, failed, image_count, ...status && { status, cancelled: status.startsWith('cancel') }, ...rest }
}

const RANKS: Record<string, number> = { cancelling: 1, completed: 2, cancelled: 2 }

/** How far an upload is. In the database none of these goes down while those before it stay. */
function reached({ finished_at, completed = 0, failed = 0, status, progress = 0 }: Change): number[] {
  return [finished_at ? 1 : 0, completed + failed, RANKS[status ?? ''] ?? 0, progress]
}

/** What is known of an upload, with more of it. Messages and answers overtake each other: what is further counts, else what comes later. */
function merged<J extends Change>(known: J, more: Change): J {
  const [mine, other] = [reached(known), reached(more)]
  const at = mine.findIndex((value, i) => value !== other[i])
  return at >= 0 && mine[at]! > other[at]! ? { ...more, ...known } : { ...known, ...more }
}

/** The same with a message. It adds nothing to an end that is known: only the database knows when that was. */
function withTold<J extends Change>(known: J, message: Change | undefined): J {
  return !message ? known : known.finished_at ? { ...message, ...known } : merged(known, message)
}

/** Whether the database has said that it is over. */
const isSettled = (job: LiveJob): boolean => Boolean(job.finished_at && job.created_at)

/** The newest ones; those that have ended go first. */
function bounded(jobs: LiveJob[]): LiveJob[] {
  while (jobs.length > MOST) {
    const ended = jobs.findLastIndex((job) => job.finished_at)
    jobs.splice(ended < 0 ? MOST : ended, 1)
  }
  return jobs
}

/** Those that this page has begun and not yet fetched have no `created_at`. */
function newestFirst(jobs: LiveJob[]): LiveJob[] {
  const made = (job: LiveJob): number => job.created_at ? Date.parse(job.created_at) : Infinity
  return jobs.sort((a, b) => made(a) === made(b) ? 0 : made(b) - made(a))
}

/** A workspace's uploads that are not over, and those that have ended since. */
export class JobList {
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #autotag: Autotag
  readonly #told = new Map<string, Change>() // since the last load began
  #since: number | null = null // when the newest upload began that was there before this list; in the server's time
  #users = 0 // that have come and gone
  #stop: (() => void) | null = null
  readonly refresh: () => Promise<void>

  constructor(client: QueryClient, queryKey: QueryKey, autotag: Autotag) {
    this.#client = client
    this.#queryKey = queryKey
    this.#autotag = autotag
    this.refresh = fetchingAnew(client, queryKey, () => this.load())
  }

  start(): void {
    this.#stop = this.#autotag.subscribe({
      onProgress: (message) => this.patch(told(message)),
      onJobComplete: (message) => this.patch({ ...told(message), finished_at: new Date().toISOString() }),
      onSync: () => { void this.refresh() },
      onUserChange: () => {
        this.#users++
        this.#told.clear()
        this.#since = null
        this.#client.setQueryData(this.#queryKey, [])
        setTimeout(() => { if (this.#stop && this.#autotag.status !== 'signed-out') void this.refresh() }) // also where no channel comes
      },
    })
  }

  stop(): void {
    this.#stop?.()
    this.#stop = null
  }

  get #shown(): LiveJob[] { return this.#client.getQueryData<LiveJob[]>(this.#queryKey) ?? [] }

  async load(): Promise<LiveJob[]> {
    this.#told.clear()
    const users = this.#users
    try {
      const fetched = await this.#fetch(users)
      if (users !== this.#users) return await this.load() // these are the former user's
      const shown = this.#shown.filter((job) => fetched.has(job.job_id) || this.#told.has(job.job_id) || isSettled(job))
      const all = new Map(shown.map((job) => [job.job_id, job]))
      for (const [id, job] of fetched) all.set(id, withTold(merged(all.get(id) ?? job, job), this.#told.get(id)))
      setTimeout(() => { if (this.#stop) for (const change of this.#told.values()) this.#show(change) }) // told before TanStack Query has stored this
      return bounded(newestFirst([...all.values()]))
    } catch (error) {
      if (error instanceof AutotagError && error.code === 'PGRST202') return this.#shown // an older server has no tagging_jobs
      throw error
    }
  }

  /** The uploads that are not over, those of the newest that began since this list did, and those that are shown and may have ended. */
  async #fetch(users: number): Promise<Map<string, LiveJob>> {
    const unsettled = this.#shown.filter((job) => !isSettled(job)).length
    const [live, recent] = await Promise.all([
      this.#autotag.jobs({ onlyLive: true, limit: MOST }),
      this.#autotag.jobs({ limit: Math.min(Math.max(unsettled, this.#since === null ? 1 : RECENT), MOST) }),
    ])
    const fetched = new Map<string, LiveJob>(live.map((job) => [job.job_id, job]))
    if (users !== this.#users) return fetched
    this.#since ??= recent[0] ? Date.parse(recent[0].created_at) : -Infinity
    const shown = new Set(this.#shown.map((job) => job.job_id))
    for (const job of recent) {
      const known = fetched.get(job.job_id)
      if (known || shown.has(job.job_id) || Date.parse(job.created_at) > this.#since) fetched.set(job.job_id, known ? merged(known, job) : job)
    }
    const missing = this.#shown.filter((job) => !fetched.has(job.job_id) && !this.#told.has(job.job_id) && !isSettled(job))
    await Promise.all(Array.from({ length: LANES }, async () => {
      for (let next; (next = missing.shift()) && users === this.#users;) {
        const job = await this.#autotag.job(next.job_id).catch((error: unknown) => {
          if (error instanceof AutotagError && error.code === 'unknown_job') return null
          throw error
        })
        if (job) fetched.set(job.job_id, job)
      }
    }))
    return fetched
  }

  patch(change: Change & { job_id: string }): void {
    const before = this.#told.get(change.job_id)
    this.#told.delete(change.job_id)
    this.#told.set(change.job_id, before ? withTold(before, change) : change)
    if (this.#told.size > MOST) this.#told.delete(this.#told.keys().next().value!)
    this.#show(change)
  }

  #show(change: Change): void {
    this.#client.setQueryData<LiveJob[]>(this.#queryKey, (jobs = []) => {
      const at = jobs.findIndex((job) => job.job_id === change.job_id)
      if (at >= 0) return jobs.map((job, i) => i === at ? withTold(job, change) : job)
      return bounded([{ job_id: change.job_id!, image_count: 0, completed: 0, failed: 0, progress: 0, eta: null, ...change }, ...jobs])
    })
  }
}

/** One upload; null: none. */
export class OneJob {
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #autotag: Autotag
  readonly #jobId: string | null
  #told: Change | undefined // since the last load began
  #users = 0 // that have come and gone
  #stop: (() => void) | null = null
  readonly refresh: () => Promise<void>

  constructor(client: QueryClient, queryKey: QueryKey, autotag: Autotag, jobId: string | null) {
    this.#client = client
    this.#queryKey = queryKey
    this.#autotag = autotag
    this.#jobId = jobId
    this.refresh = fetchingAnew(client, queryKey, () => this.load())
  }

  async load(): Promise<Job> {
    this.#told = undefined
    const users = this.#users
    const job = await this.#autotag.job(this.#jobId!)
    if (users !== this.#users) return job // it is not stored
    const known = this.#client.getQueryData<Job>(this.#queryKey)
    setTimeout(() => { if (this.#told) this.#show(this.#told) }) // told before TanStack Query has stored this
    return withTold(merged(known ?? job, job), this.#told)
  }

  start(): void {
    if (this.#jobId === null) return
    this.#stop = this.#autotag.subscribe({
      onProgress: (message) => { if (message.job_id === this.#jobId) this.#patch(told(message)) },
      onJobComplete: (message) => {
        if (message.job_id !== this.#jobId) return
        this.#patch(told(message))
        void this.refresh()
      },
      onSync: () => { if (!this.#client.getQueryData<Job>(this.#queryKey)?.finished_at) void this.refresh() },
      onUserChange: () => {
        this.#users++
        this.#told = undefined
        void this.#client.resetQueries({ queryKey: this.#queryKey, exact: true })
      },
    })
  }

  stop(): void { this.#stop?.() }

  #patch(change: Change): void {
    this.#told = this.#told ? withTold(this.#told, change) : change
    this.#show(change)
  }

  #show(change: Change): void { this.#client.setQueryData<Job>(this.#queryKey, (job) => job && withTold(job, change)) }
}
