// What the notes for React Native need of it.
declare module 'react-native' {
  export const AppState: { addEventListener(event: 'change', listener: (state: string) => void): { remove(): void } }
}
